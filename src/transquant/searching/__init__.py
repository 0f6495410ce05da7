"""AJPQ: joint pruning and quantization as one search (docs/search.md)."""

from transquant.searching.pipeline import search
from transquant.searching.policy import Policy
from transquant.searching.result import SearchResult, Summary

__all__ = ["Policy", "SearchResult", "Summary", "search"]
