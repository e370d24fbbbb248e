"""Log lines as JSON, encoded where they are logged and written by a background thread."""
