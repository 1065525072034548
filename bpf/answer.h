/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * A segment that XDP sends back in place of a SYN, out of the interface that it came in by. Written rules:
 *
 *  - It is built in the SYN's own frame: hardware addresses, IP addresses and ports change places, VLAN tags stay.
 *  - IPv4 options and IPv6 extension headers are not repeated; no TCP option but an MSS. TTL and hop limit are 64, IPv4 has
 *    "don't fragment" and no identification, traffic class and flow label are 0.
 *  - Left to the stack, to be answered or ignored there: a SYN to another hardware address than the interface's, IPv4-mapped
 *    addresses in IPv6, sources that no answer can go to, lengths that do not fit together, and whatever comes in by an
 *    interface where an answer would not arrive (see kernel/xdp.py).
 *  - The checksum of the SYN is not looked at: that may be left to the card, or not have been made yet (veth, virtio). Who
 *    goes on with the handshake is judged by a segment whose checksum the stack has looked at.
 */
#ifndef RAMA_EBPF_ANSWER_H
#define RAMA_EBPF_ANSWER_H

enum tcp_flag { TCP_SYN = 0x02, TCP_RST = 0x04, TCP_ACK = 0x10 };

#define ANSWER_TTL 64
#define MSS_BYTES 4

/* Bounds of the offsets in struct packet, which the verifier knows nothing of: they are in a map. */
#define NETWORK_MASK 31
#define TRANSPORT_MASK 0x3fff

/* Keep a value in its register, of which clang then knows nothing more: a pointer that it makes anew from the same numbers
 * is another one to the verifier, without bounds. */
#define HOLD(value) asm volatile("" : "+r"(value))

static __always_inline u32 known(u32 offset, u32 mask)
{
	HOLD(offset); /* or clang takes the mask away, knowing what was stored */
	return offset & mask;
}

/* Whether a source is one that packets can be sent to: RFC 1122, 3.2.1.3; RFC 4291, 2.7. */
static __always_inline int is_unicast(const struct packet *p)
{
	u8 first = p->source.b[p->ipv4 ? 12 : 0];

	if (p->source.half[0] == p->target.half[0] && p->source.half[1] == p->target.half[1])
		return 0;
	if (p->ipv4)
		return first && first != 127 && first < 224;
	return first != 0xff && p->source.half[0];
}

/* What is needed of a SYN to answer it. `fin` and `rst` are as in its header, `payload` is in bytes. */
struct syn_facts {
	u32 sequence;
	u32 payload;
	u8 fin, rst;
};

/* Returns 0 if the frame is not to be answered here. */
static __always_inline int read_syn(struct xdp_md *ctx, const struct packet *p, struct syn_facts *facts)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ipv6hdr *ip = data + known(p->network, NETWORK_MASK);
	struct tcphdr *tcp = (void *)ip + known(p->transport, TRANSPORT_MASK);
	u32 total, headers;

	/* An IPv4 header and a TCP header are as long as an IPv6 header. */
	if ((void *)(ip + 1) > end || (void *)(tcp + 1) > end)
		return 0;
	if (p->ipv4 != (ip->version == 4) || !is_unicast(p))
		return 0;
	total = p->ipv4 ? bpf_ntohs(((struct iphdr *)ip)->tot_len) : bpf_ntohs(ip->payload_len) + sizeof(*ip);
	headers = p->transport + tcp->doff * 4;
	if (tcp->doff < 5 || total < headers || p->network + total > end - data)
		return 0;
	facts->sequence = bpf_ntohl(tcp->seq);
	facts->payload = total - headers;
	facts->fin = tcp->fin;
	facts->rst = tcp->rst;
	return 1;
}

static __always_inline u16 fold(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* The words of a header of which the sum is the checksum's (RFC 1071): in any order of bytes that all have. */
static __always_inline u64 sum_words(const u32 *words, u32 count)
{
	u64 sum = 0;

#pragma unroll
	for (u32 i = 0; i < count; i++)
		sum += words[i];
	return sum;
}

static __always_inline void swap_hardware(struct ethhdr *eth)
{
	u16 *target = (void *)eth->h_dest, *source = (void *)eth->h_source;

#pragma unroll
	for (int i = 0; i < 3; i++) {
		u16 word = target[i];

		target[i] = source[i];
		source[i] = word;
	}
}

/* A TCP header of `size` bytes, 20, or 24 with an MSS. `pseudo` is the sum of the pseudo-header. */
static __always_inline int write_tcp(u32 *at, void *end, const struct scratch *s, u32 size, u64 pseudo)
{
	const struct packet *p = &s->packet;
	const struct answer *a = &s->answer;
	u32 words[6] = {
		bpf_htonl((u32)p->port << 16 | p->source_port),
		bpf_htonl(a->sequence),
		bpf_htonl(a->acknowledgement),
		bpf_htonl(size / 4 << 28 | (u32)a->flags << 16 | a->window),
		0,
		a->mss ? bpf_htonl(0x02040000 | a->mss) : 0,
	};

	HOLD(at);
	if ((void *)(at + 5) > end)
		return 0;
	at[0] = words[0];
	at[1] = words[1];
	at[2] = words[2];
	at[3] = words[3];
	at[4] = bpf_htonl((u32)bpf_ntohs(fold(pseudo + sum_words(words, 6))) << 16);
	at += 5;
	if (a->mss) {
		if ((void *)(at + 1) > end)
			return 0;
		*at = words[5];
	}
	return 1;
}

/* Send s->answer in place of the frame. If XDP_PASS is returned, the frame is as it came. */
static __always_inline int send_back(struct xdp_md *ctx, struct scratch *s)
{
	const struct packet *p = &s->packet;
	u32 network = known(p->network, NETWORK_MASK), size = sizeof(struct tcphdr) + (s->answer.mss ? MSS_BYTES : 0);
	u32 now = ctx->data_end - ctx->data, wanted = network + size;
	void *data, *end;

	wanted += p->ipv4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	if (bpf_xdp_adjust_tail(ctx, (int)(wanted - now)))
		return XDP_PASS;
	if (wanted < ETH_ZLEN && now >= ETH_ZLEN)
		bpf_xdp_adjust_tail(ctx, (int)(ETH_ZLEN - wanted)); /* with zeros: not every driver pads what XDP sends */
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + sizeof(struct ethhdr) > end)
		return XDP_ABORTED;
	swap_hardware(data);
	if (p->ipv4) {
		u32 *ip = data + network;
		u32 words[5] = {
			bpf_htonl(0x45000000 | (20 + size)),
			bpf_htonl(0x4000), /* DF */
			bpf_htonl(ANSWER_TTL << 24 | IPPROTO_TCP << 16),
			mapped_ipv4(&p->target),
			mapped_ipv4(&p->source),
		};

		HOLD(ip);
		if ((void *)(ip + 5) > end)
			return XDP_ABORTED;
		ip[0] = words[0];
		ip[1] = words[1];
		ip[2] = bpf_htonl(ANSWER_TTL << 24 | IPPROTO_TCP << 16 | bpf_ntohs(fold(sum_words(words, 5))));
		ip[3] = words[3];
		ip[4] = words[4];
		return write_tcp(ip + 5, end, s, size,
				 (u64)words[3] + words[4] + bpf_htonl(IPPROTO_TCP << 16 | size)) ? XDP_TX : XDP_ABORTED;
	} else {
		u32 *ip = data + network;
		u32 words[8];

		__builtin_memcpy(words, &p->target, 16);
		__builtin_memcpy(words + 4, &p->source, 16);
		HOLD(ip);
		if ((void *)(ip + 10) > end)
			return XDP_ABORTED;
		ip[0] = bpf_htonl(0x60000000);
		ip[1] = bpf_htonl(size << 16 | IPPROTO_TCP << 8 | ANSWER_TTL);
#pragma unroll
		for (int i = 0; i < 8; i++)
			ip[2 + i] = words[i];
		return write_tcp(ip + 10, end, s, size,
				 sum_words(words, 8) + bpf_htonl(IPPROTO_TCP) + (u64)bpf_htonl(size)) ? XDP_TX : XDP_ABORTED;
	}
}

#endif
