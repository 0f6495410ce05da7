"""Analysis and synthesis pairs over one axis of a weight: DCT, KLT, ELT (FORMAT.md section 6).

`layout` sees a matrix as bands along an axis, `exact` synthesizes in integers (numpy only, all that a reader needs), `fit`
finds bases, `frame` carries weights and their metric into the coefficient domain.
"""
