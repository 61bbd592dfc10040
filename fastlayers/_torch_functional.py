"""torch.nn.functional's functions as they were when this was imported.

Our operations hand calls to these, and not to what stands in torch.nn.functional by then: within `patched` that is our own
functions, which would call themselves for ever.
"""

from torch.nn.functional import *  # pyright: ignore[reportWildcardImportFromLibrary]
