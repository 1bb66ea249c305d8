"""What lateinit takes from inside torch, in one place.

Dispatch modes, operator schemas, storages, devices and the exchange of tensor implementations: no
other room uses names of torch that begin with an underscore. A torch release that breaks something
breaks it here, and one test in ``tests/torch_contract`` says what.
"""
