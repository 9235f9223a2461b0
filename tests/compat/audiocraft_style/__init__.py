"""A package as others write it for Audiocraft's base class; only the import of that class is ours.

What its solvers do with the base class is what Audiocraft's own do: `compression` as
`CompressionSolver` and `WatermarkSolver`, `musicgen` as `MusicGenSolver`, `diffusion` as
`DiffusionSolver`. Their models are as small as models get.
"""
