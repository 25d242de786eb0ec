"""A keep-alive and health daemon for LM Studio models."""

__version__ = "1.0.0"
