"""The rehearsal: a short run that is killed and resumed, compared bit by bit with one that is not.

The parent process (`conduct`) needs no torch. The parent starts two fork servers (`nursery`), which
import torch once. Each run is a new process that a server forks before any code of the user was
imported: a fresh process, without the seconds that torch takes. The two servers have different
seeds of Python's hashes, so that an order of a set shows.

1. The undisturbed run and its twin run at the same time, each in a folder of its own. What differs
   between the two differs by itself, without any kill.
2. Chains of killed runs follow. A run kills itself (SIGKILL) at its kill point, and a fresh process
   with other seeds resumes from what is on disk, up to the next kill point or to the end. Each kill
   comes after a durable save and after work that the save does not hold.
3. Each run writes records to a trace (`trace`): each batch, step, gradient, update, end of a stage
   and commit. A record maps names to digests (`snapshot`, `digest`). A resumed run also writes a
   record right after the restore, before it draws anything.
4. The parent compares the records of a resumed run with the records of the undisturbed run at the
   same places (`comparison`), and names cause and remedy (`causes`).

`probe` instruments the classes of the solver and not the instance, so that nothing new is reachable
from the solver. All files are in a scratch folder.
"""
