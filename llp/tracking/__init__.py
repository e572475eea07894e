"""The ledger of a study, which is the truth, and what is derived from it: exports and MLflow."""

from llp.tracking.ledger import Ledger, list_studies, load_study

__all__ = ["Ledger", "list_studies", "load_study"]
