"""Published methods that FAST-AR is compared with, one small file each, behind the interface of `FrameCache`. Ported to
a stream of chunks: a chunk's queries are the last rows of the papers' square masks, and the history grows."""
