"""Answering: how a base and its adapters are put to work once they are trained."""

from deltatune.serve.classify import Prediction, classify, classify_each
from deltatune.serve.proxy import ProxyTuning
from deltatune.serve.trunk import under_each

__all__ = ["Prediction", "ProxyTuning", "classify", "classify_each", "under_each"]
