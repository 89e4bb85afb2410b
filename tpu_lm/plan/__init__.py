"""Plans: what a run would do on devices that are not here.

The step that `train` would run is compiled for a topology (topology.py,
programs.py), the compiler's schedule is read (hlo.py), and memory and time are
estimated (memory.py, roofline.py). A compiled program and a roofline are no
measurement; `page.py` and the table say so.
"""
