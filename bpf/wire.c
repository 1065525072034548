/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * The wire relay: a packet of the one connection of a tunnel becomes a packet of the other, and goes out there. The
 * proxy's TCP sees nothing of it. A unit of its own that BCC compiles; the loader defines PIN_DIR and, from the running
 * kernel's BTF, the OFFSET_ constants. docs/wire.md says how a pair is taken over, and what is refused.
 *
 * `wire_relay` runs at the ingress of each Ethernet device, and at the egress of the loopback device, where a packet is
 * rewritten in place before it comes in. Whatever it does not know goes on as if it was not there (TC_ACT_UNSPEC, so
 * that filters of others have their turn).
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include "wire.h"

BPF_TABLE_PINNED("hash", struct wire_key, struct wire_flow, flows, 1, PIN_DIR "/flows");
BPF_TABLE_PINNED("array", u32, struct wire_pair, pairs, 1, PIN_DIR "/pairs");
BPF_TABLE_PINNED("array", u32, u64, alive_until, 1, PIN_DIR "/alive_until");
struct wire_options {
	u8 b[256];
};
BPF_TABLE_PINNED("percpu_array", u32, struct wire_options, options, 1, PIN_DIR "/options");
/* As BPF_RINGBUF_OUTPUT would declare them, which knows no pins. */
struct changes_table {
	int key;
	u32 leaf;
	int (*ringbuf_output)(void *, u64, u64);
	u32 max_entries;
};
__attribute__((section("maps/ringbuf:" PIN_DIR "/changes"))) struct changes_table changes = { .max_entries = 4096 };
struct notices_table {
	int key;
	u32 leaf;
	int (*ringbuf_output)(void *, u64, u64);
	u32 max_entries;
};
__attribute__((section("maps/ringbuf:" PIN_DIR "/notices"))) struct notices_table notices = { .max_entries = 4096 };

enum { LOOPBACK = 1, HOP_LIMIT = 64, STEPS = 24, CHANGES = 8 };
enum { PASS = -1 /* TC_ACT_UNSPEC */, DROP = 2 /* TC_ACT_SHOT */ };
enum { TO_US = 0 /* PACKET_HOST */ };
enum { SLACK = 65536 /* bytes that an end may be ahead of what another CPU has noted of the other's window */ };
enum { JUMBO = 8 /* bytes of the hop-by-hop header that a packet above 64 KiB has within the host */ };

#define MEMBER(type, pointer, offset) (*(type *)((void *)(pointer) + (offset)))

/* BCC 0.26 declares it with an argument less. */
static long (*redirect_neigh)(u32, void *, int, u64) = (void *)152;
static long (*csum_level)(void *, u64) = (void *)135;

static __always_inline int is_after(u32 a, u32 b)
{
	return (s32)(a - b) > 0;
}

/* Let a sequence number go on to `to`, and never back; return by how much it did. */
static __always_inline u32 advance(u64 *word, u32 to)
{
	u64 was = *(volatile u64 *)word;
	int i;

	for (i = 0; i < CHANGES; i++) {
		u64 found;

		if (!is_after(to, was))
			return 0;
		found = __sync_val_compare_and_swap(word, was, (u64)to);
		if (found == was)
			return to - (u32)was;
		was = found;
	}
	return 0;
}

/* The difference that a changed word makes to a checksum, added up in 64 bits and folded at the end. */
#define DIFFERENCE(sum, old, new) ((sum) += (u64)(u32)~(old) + (u32)(new))

static __always_inline u32 folded(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return sum;
}

static __always_inline u16 folded_to_16(u64 sum)
{
	u32 half = folded(sum);

	half = (half & 0xffff) + (half >> 16);
	half = (half & 0xffff) + (half >> 16);
	return half;
}

static __always_inline void tell(u32 pair)
{
	changes.ringbuf_output(&pair, sizeof(pair), 0);
}

static __always_inline int is_over(u64 state)
{
	return state & (WIRE_RESET0 | WIRE_RESET1) ||
	       (state & (WIRE_FINACK0 | WIRE_FINACK1)) == (WIRE_FINACK0 | WIRE_FINACK1);
}

/* -- before it is taken over ------------------------------------------------------------------------------------- */

/*
 * What a packet does to a pair that is not taken over: return the state behind it. With WIRE_TAKEN this very packet is
 * the first to be translated; 0 if it was changed by others too often.
 */
static __always_inline u64 judge(struct wire_pair *pair, struct wire_flow *flow, struct tcphdr *tcp, u32 ack, u32 end)
{
	u64 acked = flow->leg ? WIRE_ACKED1 : WIRE_ACKED0, ready = WIRE_GO | WIRE_ACKED0 | WIRE_ACKED1;
	u64 state = *(volatile u64 *)&pair->state;
	int i;

	for (i = 0; i < CHANGES; i++) {
		u64 next = state, was;

		if (state & (WIRE_TAKEN | WIRE_SPOILED | WIRE_DEAD) || !(state & WIRE_TRACK))
			return state;
		if (tcp->ack && !tcp->syn && ack == flow->expect_acked)
			next |= acked;
		if ((next & ready) == ready && !tcp->syn)
			next |= WIRE_TAKEN;
		else if (tcp->fin || tcp->rst || tcp->syn || is_after(end, flow->expect_received))
			next |= WIRE_SPOILED;
		if (next == state)
			return state;
		if (next & WIRE_TAKEN) {
			u64 now = bpf_ktime_get_ns();
			u32 ms = now / 1000000;

			/* Each end goes on to see the proxy's clock: from the next millisecond on, as the other end ticks. */
			pair->stamps[0] = ms + pair->offsets[1] + 1 - pair->recent[0];
			pair->stamps[1] = ms + pair->offsets[0] + 1 - pair->recent[1];
			pair->taken_at = now;
		}
		was = __sync_val_compare_and_swap(&pair->state, state, next);
		if (was == state) {
			if (next & WIRE_SPOILED)
				pair->spoiled_by = flow->leg << 8 | ((u8 *)tcp)[13];
			if (next & (WIRE_TAKEN | WIRE_SPOILED))
				tell(flow->pair);
			return next;
		}
		state = was;
	}
	return 0;
}

/* -- options ------------------------------------------------------------------------------------------------------ */

static __always_inline void add_at(u8 *b, u32 i, u32 add)
{
	u32 value;

	i &= 127;
	value = ((u32)b[i] << 24 | (u32)b[i + 1] << 16 | (u32)b[i + 2] << 8 | b[i + 3]) + add;
	b[i] = value >> 24;
	b[i + 1] = value >> 16;
	b[i + 2] = value >> 8;
	b[i + 3] = value;
}

/* Translate one option at `*at` of `count` bytes; return whether another may follow. */
static __always_inline int translate_option(u8 *b, u32 *at, u32 count, u32 ack, u32 stamp, u32 echo)
{
	u32 i = *at & 63, length;

	if (i >= count || !b[i]) /* the end of the list */
		return 0;
	if (b[i] == 1) { /* no operation */
		*at = i + 1;
		return 1;
	}
	length = b[(i + 1) & 127];
	if (length < 2 || i + length > count)
		return 0;
	if (b[i] == 8 && length == 10) { /* timestamps */
		add_at(b, i + 2, stamp);
		add_at(b, i + 6, echo);
	}
	if (b[i] == 5 && length >= 10) { /* SACK blocks */
		add_at(b, i + 2, ack);
		add_at(b, i + 6, ack);
		if (length >= 18) {
			add_at(b, i + 10, ack);
			add_at(b, i + 14, ack);
		}
		if (length >= 26) {
			add_at(b, i + 18, ack);
			add_at(b, i + 22, ack);
		}
		if (length >= 34) {
			add_at(b, i + 26, ack);
			add_at(b, i + 30, ack);
		}
	}
	*at = i + length;
	return 1;
}

/* All options of a segment that begin at `offset`; adds to the checksum's difference. Return 0, or -1. */
static __always_inline int translate_options(struct __sk_buff *skb, u32 offset, u32 count, struct wire_flow *flow,
					     struct wire_pair *pair, u64 *sum)
{
	u32 zero = 0, at = 0, words = count >> 2;
	u32 leg = flow->leg & 1;
	u8 *b = (void *)options.lookup(&zero);
	int i;

	if (!b)
		return -1;
	/* 1 to 10 words, as the compiler knows and verifiers before 6.3 do not: so they are told, in a way that is not lost
	 * where the number is kept on the stack. */
	asm volatile("" : "+r"(words));
	count = (((words - 1) & 15) + 1) << 2;
	if (bpf_skb_load_bytes(skb, offset, b, count) || bpf_skb_load_bytes(skb, offset, b + 160, count))
		return -1;
	for (i = 0; i < STEPS; i++)
		if (!translate_option(b, &at, count, flow->ack, pair->stamps[leg], -pair->stamps[!leg]))
			break;
	*sum += (u32)bpf_csum_diff((void *)b + 160, count, (void *)b, count, 0);
	return bpf_skb_store_bytes(skb, offset, b, count, 0) ? -1 : 0;
}

/* -- ICMP --------------------------------------------------------------------------------------------------------- */

/*
 * An ICMP error may quote a packet that we have translated: the end that sent it has to hear of it, in its own terms. The
 * rest is for userspace. The error goes on to the stack all the same, which learns the path's MTU from it.
 */
static __always_inline void note_error(struct __sk_buff *skb, int v6)
{
	struct wire_notice notice = { .kind = NOTICE_ERROR, .v6 = v6 };
	struct wire_key key = {};
	struct wire_flow *flow;

	if (v6) {
		struct ipv6hdr *inner = (void *)notice.bytes + 8;

		if (bpf_skb_load_bytes(skb, 54, notice.bytes, 56))
			return;
		if ((notice.bytes[0] != 1 && notice.bytes[0] != 2) || inner->nexthdr != IPPROTO_TCP)
			return;
		__builtin_memcpy(key.source, &inner->daddr, 16);
		__builtin_memcpy(key.target, &inner->saddr, 16);
		__builtin_memcpy(&key.dport, notice.bytes + 48, 2);
		__builtin_memcpy(&key.sport, notice.bytes + 50, 2);
	} else {
		struct iphdr *inner = (void *)notice.bytes + 8;

		if (bpf_skb_load_bytes(skb, 34, notice.bytes, 36))
			return;
		if (notice.bytes[0] != 3 || inner->protocol != IPPROTO_TCP || inner->ihl != 5)
			return;
		key.source[3] = inner->daddr;
		key.target[3] = inner->saddr;
		__builtin_memcpy(&key.dport, notice.bytes + 28, 2);
		__builtin_memcpy(&key.sport, notice.bytes + 30, 2);
	}
	flow = flows.lookup(&key);
	if (!flow)
		return;
	notice.pair = flow->pair;
	notice.leg = flow->leg;
	notices.ringbuf_output(&notice, sizeof(notice), 0);
}

/* A packet is too big for where it is to go: have its sender told. */
static __always_inline void note_too_big(struct __sk_buff *skb, struct wire_flow *flow, u32 mtu)
{
	struct wire_notice notice = { .kind = NOTICE_TOO_BIG, .pair = flow->pair, .leg = flow->leg, .v6 = flow->v6 };

	__builtin_memcpy(notice.bytes + 4, &mtu, 4);
	if (flow->v6 ? bpf_skb_load_bytes(skb, 14, notice.bytes + 8, 48) : bpf_skb_load_bytes(skb, 14, notice.bytes + 8, 28))
		return;
	notices.ringbuf_output(&notice, sizeof(notice), 0);
}

/*
 * Whether the checksum of a segment without data is right: the end that it is for drops it otherwise, and so nothing may be
 * believed of it. It was found to be right already, or is still to be computed (then it is that of the addresses alone), or
 * is computed here.
 */
static __always_inline int is_intact(struct __sk_buff *skb, u32 transport, u32 header, u32 total, struct wire_key *key,
				     u16 found)
{
	u32 zero = 0, words = header >> 2, count;
	u64 sum = (u64)bpf_htonl(total) + bpf_htonl(IPPROTO_TCP);
	u8 *b = (void *)options.lookup(&zero);
	int i;

	if (!b || total != header)
		return 0;
	if (csum_level(skb, 0 /* BPF_CSUM_LEVEL_QUERY */) >= 0)
		return 1;
#pragma unroll
	for (i = 0; i < 4; i++)
		sum += (u64)key->source[i] + key->target[i];
	if (folded_to_16(sum) == found)
		return 1;
	asm volatile("" : "+r"(words));
	count = (((words - 1) & 15) + 1) << 2;
	if (bpf_skb_load_bytes(skb, transport, b, count))
		return 0;
	sum += (u32)bpf_csum_diff(NULL, 0, (void *)b, count, 0);
	return folded_to_16(sum) == 0xffff;
}

/* -- packets ------------------------------------------------------------------------------------------------------ */

int wire_relay(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct wire_key key = {};
	struct wire_flow *flow;
	struct wire_pair *pair;
	struct wire_leg *me, *other;
	struct tcphdr *tcp;
	u32 here = skb->ifindex, zero = 0, transport, total, leg, header, seq, ack, payload, seq_end, ahead, old, new, number;
	u64 state, set = 0, sum = 0, addresses = 0, *alive;
	int v6 = 0;

	if (here != LOOPBACK && (skb->pkt_type != TO_US || skb->vlan_present))
		return PASS;
	if (here == LOOPBACK && skb->mark == WIRE_OWN_MARK)
		return PASS;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + 14;

		if ((void *)(ip + 1) + 20 > end) {
			if (bpf_skb_pull_data(skb, 54))
				return PASS;
			data = (void *)(long)skb->data;
			end = (void *)(long)skb->data_end;
			ip = data + 14;
			if ((void *)(ip + 1) + 20 > end)
				return PASS;
		}
		if (ip->ihl != 5 || ip->frag_off & bpf_htons(0x3fff))
			return PASS;
		if (ip->protocol == IPPROTO_ICMP) {
			note_error(skb, 0);
			return PASS;
		}
		if (ip->protocol != IPPROTO_TCP)
			return PASS;
		key.source[3] = ip->saddr;
		key.target[3] = ip->daddr;
		tcp = (void *)(ip + 1);
		transport = 34;
		total = bpf_ntohs(ip->tot_len);
		total = total ? total - 20 : skb->len - 34; /* 0: above 64 KiB, within the host */
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + 14;

		if ((void *)(ip + 1) + 20 > end) {
			if (bpf_skb_pull_data(skb, 74))
				return PASS;
			data = (void *)(long)skb->data;
			end = (void *)(long)skb->data_end;
			ip = data + 14;
			if ((void *)(ip + 1) + 20 > end)
				return PASS;
		}
		if (ip->nexthdr == IPPROTO_ICMPV6) {
			note_error(skb, 1);
			return PASS;
		}
		if (ip->nexthdr != IPPROTO_TCP && ip->nexthdr != 0)
			return PASS;
		__builtin_memcpy(key.source, &ip->saddr, 16);
		__builtin_memcpy(key.target, &ip->daddr, 16);
		tcp = (void *)(ip + 1);
		transport = 54;
		v6 = 1;
		if (!ip->nexthdr) {
			u8 *jumbo = (void *)(ip + 1);

			tcp = (void *)(jumbo + JUMBO);
			transport = 54 + JUMBO;
			if ((void *)(tcp + 1) > end || jumbo[0] != IPPROTO_TCP || jumbo[1])
				return PASS;
		}
		total = bpf_ntohs(ip->payload_len);
		total = total ? total - (transport - 54) : skb->len - transport;
	} else {
		return PASS;
	}
	key.sport = tcp->source;
	key.dport = tcp->dest;
	flow = flows.lookup(&key);
	if (!flow)
		return PASS;
	number = flow->pair;
	pair = pairs.lookup(&number);
	alive = alive_until.lookup(&zero);
	if (!pair || !alive)
		return PASS;
	leg = flow->leg & 1;
	header = tcp->doff * 4;
	if (header < 20 || total < header)
		return PASS; /* for the stack to drop, and count */
	seq = bpf_ntohl(tcp->seq);
	ack = bpf_ntohl(tcp->ack_seq);
	payload = total - header;
	seq_end = seq + payload + tcp->syn + tcp->fin;
	if (bpf_ktime_get_ns() > *(volatile u64 *)alive)
		return PASS; /* nobody governs it any more: the stack resets it */

	state = *(volatile u64 *)&pair->state;
	if (!(state & WIRE_TAKEN)) {
		state = judge(pair, flow, tcp, ack, seq_end);
		if (!state)
			return DROP;
		if (!(state & WIRE_TAKEN))
			return PASS;
	}
	if (state & WIRE_DEAD)
		return PASS;
	if (tcp->syn && is_over(state)) {
		__sync_fetch_and_or(&pair->state, (u64)WIRE_DEAD);
		tell(number);
		return PASS;
	}
	if (flow->device != LOOPBACK) {
		u32 mtu = 0;

		if (bpf_check_mtu(skb, flow->device, &mtu, 0, BPF_MTU_CHK_SEGS) > 0) {
			note_too_big(skb, flow, mtu);
			return DROP;
		}
	}

	me = &pair->legs[leg];
	other = &pair->legs[!leg];
	__sync_fetch_and_add(&me->packets, 1);
	me->seen = bpf_ktime_get_ns();
	/*
	 * What is not within the other end's window, or acknowledges what was never sent, is translated like anything else,
	 * for that end to refuse; but nothing is believed of it here.
	 */
	ahead = seq_end + flow->seq - (u32)other->acked;
	if (tcp->rst) {
		if ((seq + flow->seq == (u32)other->acked || seq == (u32)me->sent) &&
		    is_intact(skb, transport, header, total, &key, tcp->check))
			set |= leg ? WIRE_RESET1 : WIRE_RESET0;
	} else if ((s32)ahead <= (s32)(other->window + SLACK)) {
		advance(&me->sent, seq_end);
		if (tcp->fin && (s32)ahead >= 0) {
			me->end = seq_end;
			set |= leg ? WIRE_FIN1 : WIRE_FIN0;
		}
	}
	if (tcp->ack && !tcp->rst) {
		if (!is_after(ack + flow->ack, other->sent)) {
			__sync_fetch_and_add(&other->bytes, advance(&me->acked, ack));
			if (ack == (u32)me->acked)
				me->window = (u32)bpf_ntohs(tcp->window) << (flow->scale & 15);
		}
		if (state & (leg ? WIRE_FIN0 : WIRE_FIN1) && ack + flow->ack == other->end)
			set |= leg ? WIRE_FINACK1 : WIRE_FINACK0;
	}
	if (set & ~state) {
		u64 before = __sync_fetch_and_or(&pair->state, set);

		if (!is_over(before) && is_over(before | set))
			tell(number);
	}

	old = *(u32 *)&tcp->source;
	tcp->source = flow->sport;
	tcp->dest = flow->dport;
	new = *(u32 *)&tcp->source;
	DIFFERENCE(sum, old, new);
	old = tcp->seq;
	new = bpf_htonl(seq + flow->seq);
	tcp->seq = new;
	DIFFERENCE(sum, old, new);
	if (tcp->ack) {
		old = tcp->ack_seq;
		new = bpf_htonl(ack + flow->ack);
		tcp->ack_seq = new;
		DIFFERENCE(sum, old, new);
	}
	if (!tcp->syn && flow->shift_left != flow->shift_right) {
		/* Never up: Linux drops what ends beyond the window from 6.17 on. */
		u32 window = (u32)bpf_ntohs(tcp->window) << (flow->shift_left & 15) >> (flow->shift_right & 15);

		if (window > 0xffff)
			window = 0xffff;
		old = tcp->window;
		new = bpf_htons(window);
		tcp->window = new;
		DIFFERENCE(sum, old, new);
	}
	if (header == 32) { /* nearly always: timestamps, aligned by two no operations */
		u32 *option = (void *)(tcp + 1);

		if ((void *)(option + 3) <= end && option[0] == bpf_htonl(0x0101080a)) {
			old = option[1];
			new = bpf_htonl(bpf_ntohl(old) + pair->stamps[leg]);
			option[1] = new;
			DIFFERENCE(sum, old, new);
			old = option[2];
			new = bpf_htonl(bpf_ntohl(old) - pair->stamps[!leg]);
			option[2] = new;
			DIFFERENCE(sum, old, new);
			header = 20;
		}
	}
	if (v6) {
		struct ipv6hdr *ip = data + 14;
		u32 *to = (void *)&ip->saddr;
		int i;

#pragma unroll
		for (i = 0; i < 4; i++) {
			DIFFERENCE(addresses, to[i], flow->source[i]);
			to[i] = flow->source[i];
		}
#pragma unroll
		for (i = 0; i < 4; i++) {
			DIFFERENCE(addresses, to[i + 4], flow->target[i]);
			to[i + 4] = flow->target[i];
		}
		ip->hop_limit = HOP_LIMIT;
	} else {
		struct iphdr *ip = data + 14;
		u16 *half = (void *)ip;
		u64 all = 0;
		int i;

		DIFFERENCE(addresses, ip->saddr, flow->source[3]);
		DIFFERENCE(addresses, ip->daddr, flow->target[3]);
		ip->saddr = flow->source[3];
		ip->daddr = flow->target[3];
		ip->ttl = HOP_LIMIT;
		ip->check = 0;
#pragma unroll
		for (i = 0; i < 10; i++)
			all += half[i];
		ip->check = ~folded_to_16(all);
	}
	if (flow->device == LOOPBACK && here != LOOPBACK)
		__builtin_memset(data, 0, 12); /* the loopback device's addresses, or it is for another host */
	if (header > 20 && translate_options(skb, transport + 20, header - 20, flow, pair, &sum))
		return DROP;
	bpf_l4_csum_replace(skb, transport + 16, 0, folded(sum), 0);
	bpf_l4_csum_replace(skb, transport + 16, 0, folded(addresses), BPF_F_PSEUDO_HDR);
	if (flow->device == LOOPBACK)
		return here == LOOPBACK ? PASS : bpf_redirect(LOOPBACK, BPF_F_INGRESS);
	return redirect_neigh(flow->device, NULL, 0, 0);
}

/* -- asked by userspace ------------------------------------------------------------------------------------------- */

int wire_snapshot(struct __sk_buff *skb)
{
	struct wire_question question;
	struct wire_snapshot answer = {};
	struct bpf_sock_tuple tuple = {};
	struct tcp_sock *tp;
	void *sk, *route, *device;
	u32 length;

	if (bpf_skb_load_bytes(skb, 14, &question, sizeof(question)))
		return 1;
	if (question.v6) {
		__builtin_memcpy(tuple.ipv6.saddr, question.key.source, 16);
		__builtin_memcpy(tuple.ipv6.daddr, question.key.target, 16);
		tuple.ipv6.sport = question.key.sport;
		tuple.ipv6.dport = question.key.dport;
		sk = (void *)bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple.ipv4.saddr = question.key.source[3];
		tuple.ipv4.daddr = question.key.target[3];
		tuple.ipv4.sport = question.key.sport;
		tuple.ipv4.dport = question.key.dport;
		sk = (void *)bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 2;
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp) {
		answer.found = 1;
		answer.state = MEMBER(volatile u8, tp, OFFSET_STATE);
		answer.rcv_nxt = MEMBER(u32, tp, OFFSET_RCV_NXT);
		answer.copied_seq = MEMBER(u32, tp, OFFSET_COPIED_SEQ);
		answer.snd_una = MEMBER(u32, tp, OFFSET_SND_UNA);
		answer.snd_nxt = MEMBER(u32, tp, OFFSET_SND_NXT);
		answer.write_seq = MEMBER(u32, tp, OFFSET_WRITE_SEQ);
		answer.ts_recent = MEMBER(u32, tp, OFFSET_TS_RECENT);
		answer.tsoffset = MEMBER(u32, tp, OFFSET_TSOFFSET);
		answer.out_of_order = MEMBER(u64, tp, OFFSET_OUT_OF_ORDER) != 0;
		answer.backlog = MEMBER(u32, tp, OFFSET_BACKLOG);
		answer.snd_wnd = MEMBER(u32, tp, OFFSET_SND_WND);
		answer.rcv_wnd = MEMBER(u32, tp, OFFSET_RCV_WND);
		answer.rcv_wup = MEMBER(u32, tp, OFFSET_RCV_WUP);
		route = MEMBER(void *, tp, OFFSET_ROUTE);
		device = route ? MEMBER(void *, route, OFFSET_ROUTE_DEVICE) : 0;
		answer.device = device ? MEMBER(u32, device, OFFSET_IFINDEX) : 0;
	}
	bpf_sk_release(sk);
	bpf_skb_store_bytes(skb, 14, &answer, sizeof(answer), 0);
	return 0;
}

int wire_flip(struct __sk_buff *skb)
{
	struct wire_flip asked;
	struct wire_pair *pair;
	int i;

	if (bpf_skb_load_bytes(skb, 14, &asked, sizeof(asked)))
		return 100;
	pair = pairs.lookup(&asked.pair);
	if (!pair)
		return 101;
	for (i = 0; i < 16; i++) {
		u64 state = *(volatile u64 *)&pair->state;

		if (state & asked.unless || (asked.deadline && bpf_ktime_get_ns() > asked.deadline))
			return 1;
		if (__sync_val_compare_and_swap(&pair->state, state, state | asked.bits) == state)
			return 0;
	}
	return 102;
}
