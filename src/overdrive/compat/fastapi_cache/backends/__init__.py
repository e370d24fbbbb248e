"""The names of backends. Entries are kept where Overdrive keeps them."""
