"""Questions about facts that are spread over a long text: bAbI's twenty worlds and the haystacks of BABILong."""
