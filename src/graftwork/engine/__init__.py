"""The engine: everything about adapters that is not the mathematics of one method."""

from .adapter import Adapter as Adapter
from .adapter import Additive as Additive
from .adapter import LowRank as LowRank
from .adapter import Shared as Shared
from .host import Beneath as Beneath
from .host import Host as Host
from .site import Conv1D as Conv1D
from .site import Embedding as Embedding
from .site import Site as Site
