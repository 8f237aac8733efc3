-- Makes a compressed chunk ready for many late readings; the compression policy compresses it again. A function of
-- the owner's, so that the service's role need not own the hypertable. Never called where there is no TimescaleDB.

CREATE FUNCTION open_chunk(chunk regclass) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
BEGIN
    PERFORM FROM timescaledb_information.chunks
    WHERE hypertable_name = 'reading' AND format('%I.%I', chunk_schema, chunk_name)::regclass = chunk;
    IF NOT FOUND THEN
        RAISE EXCEPTION '% is no chunk of reading', chunk USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM decompress_chunk(chunk, true);
END;
$$;
REVOKE EXECUTE ON FUNCTION open_chunk FROM public;
