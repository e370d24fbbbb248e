"""One module a rival: the same small app, made of what its documentation recommends for speed."""
