"""Which rotary embeddings can be run; without torch, for plans."""

# Those whose frequencies depend on neither the layer nor the length of the sequence, so that one table holds them.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
