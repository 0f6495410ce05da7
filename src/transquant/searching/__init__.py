"""AJPQ: joint pruning and quantization as one search (docs/search.md)."""

from transquant.searching.policy import Policy
from transquant.searching.result import SearchResult, Summary
from transquant.searching.search import search

__all__ = ["Policy", "SearchResult", "Summary", "search"]
