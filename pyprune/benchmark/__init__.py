"""The benchmark of the operators, `pyprune benchmark`, and the tuning of their Triton kernels, `pyprune tune`.

cases/ holds one operator a file: its problems, other ways to solve them, what is right. runner.py checks and times a
case and knows no operator; results.py is the document, page.py its HTML page. The scripts in benchmarks/ time by the
same clock (timing.py, machine.py).
"""
