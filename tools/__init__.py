"""Commands beside the launcher, and what they share.

`bench` times and checks parts of the engine, `demo` makes the demo model's parts and measures it, `checkpoint` holds
what make_checkpoint and quantize_checkpoint write by.
"""
