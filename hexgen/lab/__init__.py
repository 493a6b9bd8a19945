"""A laboratory: an unlike cluster of real processes, Ray nodes and sockets on one Linux machine.

A network namespace a node, joined by a bridge in a namespace of its own; links shaped by ``tc``, compute by
control groups. Everything a lab makes carries its number, so that it can be found and removed by name alone,
whoever died.
"""
