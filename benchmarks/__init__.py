"""Every claim as a ratio, measured beside what a team would use instead, in one run: `make bench`."""
