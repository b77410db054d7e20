"""Engines that run kept tokens through a stock Hugging Face model; the one place that imports transformers.

Other packages may import the names below. From the rest of core, they may import the names of ``cggr_core`` itself and
of its modules ``settings``, ``checks``, ``backends``, ``monitor``, ``stopwatch``, ``step``, ``recording``,
``logprobs`` and ``experimental``. Everything else is private to core and may change in any release.

============================  =========================================================================================
name                          contract
============================  =========================================================================================
:class:`Engine`               the passes over one model: ``inputs``, ``prepare``, ``plain``, ``context``, ``gradient``
:class:`Head`                 what a model does between its last hidden state and its logits
:class:`TokenInputs`          a checked batch, created by :meth:`Engine.inputs`
:class:`Shared`               a prompt's keys and values, shared by rows that continue it
:class:`Context`              the results of a context pass; :data:`NO_CONTEXT` for none
:func:`fused_forwards`        replacement forwards for a model's norms, attentions and MLPs
:func:`forward_replaced_by`   redirects a module's call to a function, inside which the module is restored
:func:`replaced_forwards`     replaces the ``forward`` of modules within a block
:func:`replaced_parameters`   replaces the parameters of modules within a block
:func:`without_hooks`         a module without its hooks within a block, to be called inside its own call
:func:`shards_layers`         whether ``fully_shard`` was applied to layers, so that every pass of one is a collective
:func:`whole_rows`            no host read of positions, and no needless mask, within a block
:func:`unwrapped`             the Hugging Face model inside a PEFT wrapper
============================  =========================================================================================
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "routing through a model needs transformers >= 5.17: python -m pip install 'transformers>=5.17'"
    ) from error

from cggr_core.routing.architectures import unwrapped
from cggr_core.routing.context_pass import NO_CONTEXT, Context
from cggr_core.routing.engine import Engine
from cggr_core.routing.fusions import fused_forwards
from cggr_core.routing.heads import Head
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.masks import whole_rows
from cggr_core.routing.patches import forward_replaced_by, replaced_forwards, replaced_parameters, without_hooks
from cggr_core.routing.sharding import shards_layers
from cggr_core.routing.shared import Shared

__all__ = [
    "NO_CONTEXT",
    "Context",
    "Engine",
    "Head",
    "Shared",
    "TokenInputs",
    "forward_replaced_by",
    "fused_forwards",
    "replaced_forwards",
    "replaced_parameters",
    "shards_layers",
    "unwrapped",
    "whole_rows",
    "without_hooks",
]
