"""What `stage=label` needs: pairs to judge, the file of votes, which pair is next, the page, the snapshot."""
