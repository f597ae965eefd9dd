"""The only package that touches a live model. Methods depend on it; it depends on no method."""

from deltatune.core.adapter import Adapter, flatten, save
from deltatune.core.callback import Callback, Events, Groups, Run
from deltatune.core.checkpoint import load, read_adapter
from deltatune.core.config import Config
from deltatune.core.constant import Constant, Staged
from deltatune.core.errors import DeltatuneError, nearest
from deltatune.core.method import Init, Method, Shape, Site, Union, matching
from deltatune.core.select import Fused, Layers, Part, Select, resolve
from deltatune.core.slot import within
from deltatune.core.start import Awaiting, DataInit, Waiting, initialise
from deltatune.core.surgery import Plan, activate, adapters, attach, detach, merge, plan, unmerge, using
from deltatune.core.units import Base, Delta, Intervention, Router
from deltatune.storage.layers import plain_class

__all__ = [
    "Adapter", "Awaiting", "Base", "Callback", "Config", "Constant", "DataInit", "Delta", "DeltatuneError", "Events",
    "Fused", "Groups", "Init", "Intervention", "Layers", "Method", "Part", "Plan", "Router", "Run", "Select", "Shape",
    "Site", "Staged", "Union", "Waiting", "activate", "adapters", "attach", "detach", "flatten", "initialise", "load",
    "matching", "merge", "nearest", "plain_class", "plan", "read_adapter", "resolve", "save", "unmerge", "using",
    "within",
]  # fmt: skip
