"""The shapes and names of other libraries, for services that move here."""
