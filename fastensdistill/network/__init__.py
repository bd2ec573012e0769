"""How networks become launches.

1. ``trace`` turns a module into a ``Network``: a list of typed nodes with shapes and parameter names (``nodes.py``).
2. ``Group`` says who runs in a pass, in which BatchNorm mode, and whose gradient is wanted (``launch.py``).
3. ``plan`` puts groups of one architecture and mode into a ``Part`` and walks the nodes, ``forward.py`` from the image
   on, ``backward.py`` from the logits back: each op takes along what its launch can fuse, as their ``FUSIONS`` say.
   ``launch.py`` lists the steps, the names of buffers, and the rules in words.
4. ``engine/passes.py`` runs a ``Part``'s launches; ``table.py`` prints them with their arithmetic, traffic and least
   time.
"""
