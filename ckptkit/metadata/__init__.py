"""What is written about a checkpoint, to and from JSON: one module per file of the format.

Nothing here touches storage: bytes come in with the name of their file, and go out. Every decoder gives a valid result
or raises `errors.FormatError`, whatever the bytes are; nothing in them is executed and no size in them is allocated.
"""
