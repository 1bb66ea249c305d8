"""Everything that lateinit uses of torch's private parts, in one place.

Gives the rooms above dispatch modes, operator schemas, storages, devices, callers' frames and the
exchange of tensor implementations. No other room uses a name of torch that begins with an
underscore. So a torch release that changes a private part breaks this room, and a test in
``tests/torch_contract`` names the part. May import the leaf modules only. Start with ``operators``
and ``modes``.
"""
