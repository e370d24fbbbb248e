"""Pages of a statement's rows, by number or by cursor."""
