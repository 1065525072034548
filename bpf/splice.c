/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * The relay in the kernel: a verdict on every buffer that TCP has received in order on a tunnel's socket. A unit of
 * its own that BCC compiles; the loader defines PIN_DIR and, from the running kernel's BTF, the OFFSET_ constants.
 *
 * Two things are wrong with a plain redirect, and are put right here.
 * - It has no back-pressure: what is redirected is acknowledged to the sender at once and queued without bound. So a
 *   direction has a credit; beyond it bytes stay with the source's own reader (a spill), TCP's window closes, and
 *   userspace carries them across until the kernel can take over again at an exact byte.
 * - It sees whole buffers, also where a retransmission overlaps what was received before. So each buffer's sequence
 *   number is compared with what comes next, and duplicate bytes are cut off.
 */
#include <linux/types.h>
#include "splice.h"

BPF_TABLE_PINNED("hash", u64, u32, slots, 1, PIN_DIR "/slots");
BPF_TABLE_PINNED("array", u32, struct direction, directions, 1, PIN_DIR "/directions");
BPF_TABLE_PINNED("array_of_maps", u32, u32, rings, 1, PIN_DIR "/rings");

/* By slot. A hash and no array because BCC's macros for arrays of sockets cannot redirect from a pinned one. */
struct relayed_table_t {
	u32 key;
	u64 leaf;
	u64 *(*lookup)(u32 *);
	int (*sk_redirect_hash)(void *, u32 *, u64);
	u32 max_entries;
	int flags;
};
__attribute__((section("maps/sockhash:" PIN_DIR "/relayed"))) struct relayed_table_t relayed = { .max_entries = 1 };
BPF_ANNOTATE_KV_PAIR(relayed, u32, u64);

enum { MAX_TRIM = 4095, TRIM_STEPS = 17 }; /* what one bpf_skb_adjust_room may cut, and how often 64 KiB takes */

/* A member of a kernel structure, by its offset from BTF. */
#define MEMBER(type, pointer, offset) (*(type *)((void *)(pointer) + (offset)))

static __always_inline void tell(struct direction *d, u32 slot)
{
	void *ring = rings.lookup(&d->ring);

	if (ring && !bpf_ringbuf_output(ring, &slot, sizeof(slot), 0))
		d->told = d->resume + 1;
}

static __always_inline int broken(struct direction *d, u32 slot)
{
	d->state |= DIRECTION_BROKEN;
	tell(d, slot);
	return SK_DROP;
}

/* Cut `count` bytes off the head of a buffer. */
static __always_inline int trim(struct __sk_buff *skb, u32 count)
{
	int i;

	for (i = 0; i < TRIM_STEPS && count; i++) {
		u32 step = count < MAX_TRIM ? count : MAX_TRIM;

		if (bpf_skb_adjust_room((void *)skb, -(s32)step, 0, 0))
			return -1;
		count -= step;
	}
	return count ? -1 : 0;
}

/*
 * How many bytes are on their way from here to the acknowledgement of the sink's peer: in the sink's backlog, its
 * send queue, or on the wire. When `arm` is set, all that was written to the sink is in its send queue.
 */
static __always_inline s64 in_flight(struct direction *d, u32 sink, int arm)
{
	struct bpf_sock *sk = (void *)relayed.lookup(&sink);
	struct tcp_sock *tp;
	s64 bytes = -1;

	if (!sk)
		return -1;
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp) {
		if (arm)
			d->origin = MEMBER(u32, tp, OFFSET_WRITE_SEQ) - (u32)d->redirected;
		bytes = (u32)(d->origin + (u32)d->redirected - MEMBER(u32, tp, OFFSET_SND_UNA));
	}
	bpf_sk_release(sk);
	return bytes;
}

/*
 * Whether the credit holds. What is on its way grows by nothing but what is redirected from here on, so the answer is good
 * for as many bytes more as are missing to the credit: a tunnel that talks is looked up at its sink once in a credit.
 */
static __always_inline int has_credit(struct direction *d, u32 sink, int arm)
{
	s64 bytes = in_flight(d, sink, arm);

	if (bytes < 0 || bytes > d->credit)
		return 0;
	d->cleared = d->redirected + d->credit - bytes;
	return 1;
}

int relay_verdict(struct __sk_buff *skb)
{
	u64 cookie = bpf_get_socket_cookie(skb);
	u32 *known = slots.lookup(&cookie);
	struct direction *d;
	u32 slot, sink, seq, len;
	s32 duplicate;

	if (!known)
		return SK_PASS;
	slot = *known;
	sink = slot ^ 1;
	d = directions.lookup(&slot);
	if (!d)
		return SK_PASS;
	len = skb->len;
	if (!len)
		return SK_DROP; /* a bare FIN: userspace learns of it from the socket's state */
	if (d->state & DIRECTION_BROKEN)
		return SK_DROP;

	if (!(d->state & DIRECTION_SYNCED)) {
		struct bpf_sock *sk = skb->sk;
		struct tcp_sock *tp;

		if (!sk)
			return broken(d, slot);
		tp = bpf_skc_to_tcp_sock(sk);
		if (!tp)
			return broken(d, slot);
		d->next = MEMBER(u32, tp, OFFSET_COPIED_SEQ);
		/* TCP counts what it has received in order; what waits in the queue has not been read. */
		d->before = MEMBER(u64, tp, OFFSET_BYTES_RECEIVED) - (u32)(MEMBER(u32, tp, OFFSET_RCV_NXT) - d->next);
		d->state |= DIRECTION_SYNCED;
	}
	/* The context of this program type is the kernel's own sk_buff; TCP keeps the sequence number in its cb. */
	if (bpf_probe_read_kernel(&seq, sizeof(seq), (void *)skb + OFFSET_SKB_SEQ))
		return broken(d, slot);
	duplicate = d->next - seq;
	if (duplicate) {
		if (duplicate < 0)
			return broken(d, slot); /* a gap cannot be */
		d->trimmed += (u32)duplicate < len ? duplicate : len;
		if (duplicate >= len)
			return SK_DROP;
		if (trim(skb, duplicate))
			return broken(d, slot);
		len -= duplicate;
	}
	d->next += len;

	if (!(d->state & DIRECTION_ARMED) && d->resume == d->passed && has_credit(d, sink, 1))
		d->state |= DIRECTION_ARMED;
	if (d->state & DIRECTION_ARMED) {
		if (d->redirected <= d->cleared || has_credit(d, sink, 0)) {
			d->redirected += len;
			return relayed.sk_redirect_hash(skb, &sink, 0);
		}
		d->state &= ~DIRECTION_ARMED;
		d->spills++;
	}
	/* Userspace clears `watching`, then reads `passed`; here it is the other way round: one of the two sees it. */
	__sync_fetch_and_add(&d->passed, len);
	if (!d->watching && d->told != d->resume + 1)
		tell(d, slot);
	return SK_PASS;
}
