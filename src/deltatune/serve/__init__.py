"""Answering: how a base and its adapters are put to work once they are trained."""

from deltatune.serve.classify import Prediction, classify
from deltatune.serve.proxy import ProxyTuning

__all__ = ["Prediction", "ProxyTuning", "classify"]
