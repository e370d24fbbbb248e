"""Who may ask the database when more ask than it can answer. It imports no other part."""
