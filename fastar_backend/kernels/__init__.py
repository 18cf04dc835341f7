"""GPU kernels in the OpenAI Triton language, each beside its plain reference. `ops` launches them.

Arguments are ordered: inputs, scalars, outputs (written in place); there is no hidden scratch memory, addresses are 64-bit.
"""
