"""The conformance suite: proves that a compressor keeps the contract of `multifd.hookspecs`.

    multifd conformance NAME
    pytest --multifd-compressor NAME        (pip install './core[testing]')

`checks.CHECKS` is the list of what is asked, each with the sentence of the contract that it
holds a compressor to; `runner` runs each in a child process of its own, so that one that
crashes, hangs or eats memory is a check that failed; `harness` calls the hooks as core does.
"""
