"""Parts of `stage=label`: pairs to judge, the file of votes, the order of pairs, the page, the snapshot."""
