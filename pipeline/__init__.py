"""winnow: a labelled image set and a large unlabelled pool become a better small classifier."""
