"""The names of coders. Nothing is coded by them: only `JsonCoder`, the default, is accepted."""


class Coder:
    """What a coder of one's own derives from."""


class JsonCoder(Coder):
    """The default."""


class PickleCoder(Coder):
    """What is refused: whoever can write to the store could have anything run."""
