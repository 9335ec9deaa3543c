package main

// Joining a swarm and staying in it.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
)

const (
	bootstrapEnough  = 4
	bootstrapTimeout = 60 * time.Second
	// bootstrapGrace is how long the others may take once one bootstrap peer has answered.
	bootstrapGrace = 3 * time.Second
	bootstrapCheck = time.Minute
)

// joinSwarm connects to bootstrap peers: to enough of them, or all that answer, but to one at least. The error names
// every address that was tried and what was wrong with it.
func (d *daemon) joinSwarm() error {
	for _, p := range d.opts.bootstrapFrom {
		d.host.Peerstore().AddAddrs(p.ID, p.Addrs, peerstore.PermanentAddrTTL)
	}
	ctx, cancel := context.WithTimeout(d.ctx, bootstrapTimeout)
	context.AfterFunc(d.ctx, cancel)
	results := d.dialBootstrap(ctx)
	var failures []string
	connected := 0
	var grace <-chan time.Time
	for tried := 0; tried < len(d.opts.bootstrapFrom) && connected < bootstrapEnough; tried++ {
		select {
		case err := <-results:
			if err != nil {
				failures = append(failures, err.Error())
				continue
			}
			connected++
			if grace == nil {
				grace = time.After(bootstrapGrace)
			}
		case <-grace:
			tried = len(d.opts.bootstrapFrom)
		case <-d.life.ended:
			return errors.New("ended while connecting to the swarm")
		}
	}
	if connected == 0 {
		return fmt.Errorf("no bootstrap peer can be reached: %s", strings.Join(failures, "; "))
	}
	if len(failures) > 0 {
		log.Warnw("some bootstrap peers cannot be reached", "failures", failures)
	}
	go d.stayJoined()
	if d.dht == nil {
		return nil
	}
	return d.dht.Bootstrap(d.ctx)
}

// dialBootstrap dials the bootstrap peers in random order, some at a time, and reports each attempt.
func (d *daemon) dialBootstrap(ctx context.Context) <-chan error {
	peers := slices.Clone(d.opts.bootstrapFrom)
	rand.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
	queue := make(chan peer.AddrInfo, len(peers))
	for _, p := range peers {
		queue <- p
	}
	close(queue)
	results := make(chan error, len(peers))
	for range min(bootstrapEnough, len(peers)) {
		go func() {
			for p := range queue {
				err := d.host.Connect(network.WithAllowLimitedConn(ctx, "p2pd"), p)
				if err != nil {
					err = fmt.Errorf("%s/p2p/%s: %s", joinAddrs(p), p.ID, oneLine(err))
				}
				results <- err
			}
		}()
	}
	return results
}

func joinAddrs(p peer.AddrInfo) string {
	var texts []string
	for _, a := range p.Addrs {
		texts = append(texts, a.String())
	}
	return strings.Join(texts, ",")
}

// stayJoined finds the way back after the network was away, or the computer asleep.
func (d *daemon) stayJoined() {
	ticker := time.NewTicker(bootstrapCheck)
	defer ticker.Stop()
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-ticker.C:
		}
		if len(d.host.Network().Peers()) >= bootstrapEnough {
			continue
		}
		ctx, cancel := context.WithTimeout(d.ctx, bootstrapTimeout)
		results := d.dialBootstrap(ctx)
		for range d.opts.bootstrapFrom {
			if err := <-results; err != nil {
				log.Debugw("bootstrap peer away", "error", err)
			}
		}
		cancel()
	}
}
