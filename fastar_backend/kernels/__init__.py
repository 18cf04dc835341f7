"""GPU kernels in the OpenAI Triton language, each beside its plain reference. `ops` launches them.

Arguments are ordered: inputs, scalars, outputs (written in place); no hidden scratch memory; heads are addressed in 64
bits.
"""
