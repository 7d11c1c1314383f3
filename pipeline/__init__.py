"""winnow: a labelled image set and a large unlabelled pool become a better small classifier."""

import os

# OpenMP's threads spin while they wait for each other. On a machine whose cores are all busy that costs a factor of three to
# six: the spinner holds the core that the other thread waits for. Read once, when torch loads the OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
