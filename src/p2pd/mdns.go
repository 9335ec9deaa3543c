package main

import (
	"crypto/sha256"
	"encoding/hex"
)

// mdnsService turns the name of a swarm into a service name, so that only peers of the same swarm meet and the name
// itself is not shouted into the network. A label of DNS has at most 63 characters.
func mdnsService(swarm string) string {
	digest := sha256.Sum256([]byte(swarm))
	return "_p2pd-" + hex.EncodeToString(digest[:8]) + "._udp"
}
