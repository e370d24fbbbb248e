"""What happened, as frozen events that any callable can listen to."""
