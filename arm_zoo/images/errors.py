"""What is raised where a source of images cannot be used."""


class SourceError(ValueError):
    """A source of images that is missing, empty, unclear, or does not fit its use."""
