"""Skip what cannot be an entry of the DHT, one by one, wherever it comes in.

Why: one peer's malformed entry spoilt everybody's look-ups. A value that cannot be decoded raised in the middle of a search, whose
    future was never resolved; a subkey of another type raised in the heap of every dictionary that held it ("TypeError: '<' not
    supported between instances of 'str' and 'int'"); a plain value below a key hid all entries there; and one entry refused by a
    validator made the whole dictionary unknown.
Status: pending
Upstream-issue: none
Drop-when: upstream's nodes skip entries that they cannot read.
"""

from petals_win.upstream.declare import add, add_import, replace

add_import("hivemind.dht.storage", "from hivemind.utils.timed_storage import get_dht_time")
add_import("hivemind.dht.storage", "from petals_win.dht.entries import check_entry, sane_entries, skipped")
add_import(
    "hivemind.dht.protocol", "from petals_win.dht.entries import MOST_BYTES, check_entry, check_expiry, skipped"
)
add_import("hivemind.dht.node", "from petals_win.dht.entries import decode_entries")


@replace("hivemind.dht.storage:DictionaryDHTValue.unpackb", digest="bf150558b2ca51bc")
@classmethod
def unpackb(cls, raw: bytes) -> DictionaryDHTValue:
    packed = MSGPackSerializer.loads(raw)
    entries = packed[2] if isinstance(packed, list) and len(packed) == 3 else None
    with cls().freeze() as dictionary:
        for subkey, value, expiration_time in sane_entries(entries, get_dht_time()):
            dictionary.store(subkey, value, expiration_time)
    return dictionary


@replace("hivemind.dht.storage:DHTLocalStorage.store", digest="01229ccac42563ca")
def store(
    self, key: DHTID, value: BinaryDHTValue, expiration_time: DHTExpiration, subkey: Optional[Subkey] = None
) -> bool:
    """Keep a value, or an entry of a dictionary, until it expires; False if there is a later one. No plain value replaces entries."""
    if subkey is not None:
        return self.store_subkey(key, subkey, value, expiration_time)
    known, entries = self.get(key), isinstance(value, DictionaryDHTValue)
    if known is not None and isinstance(known.value, DictionaryDHTValue) != entries:
        if not entries:
            return False
        del self[key]
    return super().store(key, value, expiration_time)


@replace("hivemind.dht.storage:DHTLocalStorage.store_subkey", digest="42ea7eb11d97b9fe")
def store_subkey(self, key: DHTID, subkey: Subkey, value: BinaryDHTValue, expiration_time: DHTExpiration) -> bool:
    """Add an entry to the dictionary below the key, which replaces a plain value; False if there is a later one."""
    try:
        check_entry(subkey, value, expiration_time, get_dht_time())
    except ValueError as e:
        skipped.add("an entry", e)
        return False
    known = self.get(key)
    if known is None or not isinstance(known.value, DictionaryDHTValue):
        dictionary = DictionaryDHTValue()
        return dictionary.store(subkey, value, expiration_time) and self.store(key, dictionary, expiration_time)
    if expiration_time > known.expiration_time:
        self.store(key, known.value, expiration_time)
    return known.value.store(subkey, value, expiration_time)


@replace("hivemind.dht.protocol:DHTProtocol._validate_record", digest="5a5f90cd8e93c37c")
def _validate_record(
    self, key_bytes: bytes, subkey_bytes: bytes, value_bytes: bytes, expiration_time: DHTExpiration
) -> bool:
    """Whether to keep a record. What cannot be one is counted."""
    try:
        if subkey_bytes == self.IS_REGULAR_VALUE:
            check_expiry(expiration_time, get_dht_time())
            if len(value_bytes) > MOST_BYTES:
                raise ValueError("it is too large")
        else:
            check_entry(self.serializer.loads(subkey_bytes), value_bytes, expiration_time, get_dht_time())
        record = DHTRecord(key_bytes, subkey_bytes, value_bytes, expiration_time)
        return self.record_validator is None or self.record_validator.validate(record)
    except Exception as e:  # of any validator, about bytes of a stranger
        skipped.add("a record", e)
        return False


@replace("hivemind.dht.protocol:DHTProtocol._validate_dictionary", digest="6f4824a5cbe8c01a")
def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
    """Take the entries out that are not to be kept; whether this is a dictionary at all."""
    if not isinstance(dictionary, DictionaryDHTValue):
        skipped.add("a dictionary", "it is none")
        return False
    with dictionary.freeze():
        for subkey, (value_bytes, expiration_time) in list(dictionary.items()):
            if not self._validate_record(key_bytes, self.serializer.dumps(subkey), value_bytes, expiration_time):
                del dictionary[subkey]
    return True


@replace("hivemind.dht.node:_SearchState.add_candidate", digest="5e295232c755058d")
def add_candidate(self, candidate: Optional[ValueWithExpiration], source_node_id: Optional[DHTID]):
    """Take what a peer has found into account: entries of a dictionary are united, and go before a plain value."""
    if self.finished or candidate is None:
        return
    best, new = self.binary_value, candidate.value
    latest = -float("inf") if self.expiration_time is None else self.expiration_time
    if isinstance(best, DictionaryDHTValue):
        if not isinstance(new, DictionaryDHTValue):
            return
        for subkey, entry in new.items():
            best.store(subkey, entry.value, entry.expiration_time)
    elif isinstance(new, DictionaryDHTValue):
        # A copy: it is added to above, and may be this node's own.
        self.binary_value, latest = DictionaryDHTValue(), -float("inf")
        for subkey, entry in new.items():
            self.binary_value.store(subkey, entry.value, entry.expiration_time)
    elif candidate.expiration_time > latest:
        self.binary_value = new
    if candidate.expiration_time > latest:
        self.expiration_time, self.source_node_id = candidate.expiration_time, source_node_id
        if self.expiration_time >= self.sufficient_expiration_time:
            self.finish_search()


@replace("hivemind.dht.node:_SearchState.finish_search", digest="620e4cfdb628ecb2")
def finish_search(self):
    """Resolve the future with what was found and can be read, None if nothing was."""
    if self.future.done():
        return
    result = None
    if isinstance(self.binary_value, DictionaryDHTValue):
        entries = decode_entries(self.binary_value.items(), self._decode_entry)
        entries = {subkey: ValueWithExpiration(value, expires) for subkey, (value, expires) in entries.items()}
        result = ValueWithExpiration(entries, self.expiration_time)
    elif self.found_something:
        plain = [(None, (self.binary_value, self.expiration_time))]
        for value, expires in decode_entries(plain, self._decode_entry).values():
            result = ValueWithExpiration(value, expires)
    self.future.set_result(result)


@add("hivemind.dht.node:_SearchState")
def _decode_entry(self, subkey: Optional[Subkey], value_bytes: bytes, expiration_time: DHTExpiration) -> DHTValue:
    if self.record_validator is not None:
        tag = DHTProtocol.IS_REGULAR_VALUE if subkey is None else self.serializer.dumps(subkey)
        record = DHTRecord(self.key_id.to_bytes(), tag, value_bytes, expiration_time)
        value_bytes = self.record_validator.strip_value(record)
    return self.serializer.loads(value_bytes)
