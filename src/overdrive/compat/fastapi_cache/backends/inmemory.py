"""`InMemoryBackend`, where fastapi-cache2 has it."""


class InMemoryBackend:
    """Asks for nothing: any store will do."""
