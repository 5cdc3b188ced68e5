"What the processes of test_devices.py do: in a file of its own, because they import it, and it imports next to nothing."

import time

from cv_lab.core import BadInput


def shout(i: int) -> None:
    print(f'{i} began', flush=True)
    if i == 0: raise BadInput('no such thing', 'a thing', 'look again')
    time.sleep(3600)
