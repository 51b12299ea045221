"""How much is moved at once."""

BATCH_BYTE_SIZE = 16 << 20
"""Large enough to amortise Python, small enough that reading, checking and assembling overlap."""

BATCH_LEAVES = 4096
