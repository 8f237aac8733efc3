"""A simulated fleet, its record of the truth, and the comparison of that record with what was stored.

The independent other side of the wire: nothing here imports `gateway` or `cloud_sync`, and the MQTT stack
is another one (aiomqtt, paho underneath), so that an error of ours is not mirrored here.

    waveforms -> device -> fleet  \
                                   >  broker (MQTT)  and  truth (what was produced, what was acknowledged)
    recordings -> replay          /
    truth + stored rows (postgres, lines, influx) -> verify
"""
