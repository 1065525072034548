/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * From the bytes of an IP packet to the few facts that policy is about. Written rules for what is unusual:
 *
 *  - IPv4 options and IPv6 hop-by-hop, destination, routing and authentication headers are stepped over.
 *  - A fragment other than the first has no TCP header and is none of the gate's business (the stack judges the
 *    reassembled packet, and then cgroup_skb sees it whole): PACKET_OTHER. A first fragment likewise, because its TCP
 *    header may lie in the next one.
 *  - An IPv6 fragment header on a packet that is whole (RFC 6946) is stepped over.
 *  - More than MAX_EXTENSIONS extension headers, or a header that the packet is too short for: PACKET_MALFORMED.
 *  - Up to two VLAN tags (802.1Q, 802.1ad) are stepped over; behind more, the frame is PACKET_OTHER.
 *  - IPv4-mapped IPv6 addresses on the wire are judged as the IPv4 address that they name.
 */
#ifndef RAMA_EBPF_PACKET_H
#define RAMA_EBPF_PACKET_H

#define MAX_EXTENSIONS 6

enum packet_kind { PACKET_TCP = 0, PACKET_OTHER = 1, PACKET_MALFORMED = 2 };

static __always_inline void map_ipv4(struct address *to, u32 ip)
{
	__builtin_memset(to->b, 0, 10);
	to->b[10] = 0xff;
	to->b[11] = 0xff;
	__builtin_memcpy(to->b + 12, &ip, 4);
}

/*
 * An address out of a program's context, where IPv4 and IPv6 are separate fields. All are read, and held in registers
 * by the empty asm, before the family is looked at: in two branches, clang would merge the reads behind a computed
 * context pointer, which the verifier refuses.
 */
#define CONTEXT_ADDRESS(to, is_ipv4, field4, field6)                                                    \
	({                                                                                              \
		u32 four_ = field4, a_ = field6[0], b_ = field6[1], c_ = field6[2], d_ = field6[3];     \
		asm volatile("" : "+r"(four_), "+r"(a_), "+r"(b_), "+r"(c_), "+r"(d_));                 \
		if (is_ipv4) {                                                                          \
			map_ipv4(to, four_);                                                            \
		} else {                                                                                \
			u32 six_[4] = { a_, b_, c_, d_ };                                               \
			__builtin_memcpy((to)->b, six_, 16);                                            \
		}                                                                                       \
	})

static __always_inline u32 mapped_ipv4(const struct address *from)
{
	u32 ip;

	__builtin_memcpy(&ip, from->b + 12, 4);
	return ip;
}

static __always_inline int is_mapped(const struct address *a)
{
	u64 high;
	u32 middle;

	__builtin_memcpy(&high, a->b, 8);
	__builtin_memcpy(&middle, a->b + 8, 4);
	return high == 0 && middle == bpf_htonl(0xffff);
}

static __always_inline int parse_tcp(void *at, void *end, struct packet *p)
{
	struct tcphdr *tcp = at;

	if ((void *)(tcp + 1) > end)
		return PACKET_MALFORMED;
	p->port = bpf_ntohs(tcp->dest);
	p->source_port = bpf_ntohs(tcp->source);
	p->syn = tcp->syn && !tcp->ack;
	return PACKET_TCP;
}

static __always_inline int parse_ipv4(void *at, void *end, struct packet *p)
{
	struct iphdr *ip = at;
	u32 length;

	if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
		return PACKET_MALFORMED;
	if (ip->protocol != IPPROTO_TCP)
		return PACKET_OTHER;
	if (ip->frag_off & bpf_htons(0x3fff)) /* MF or an offset */
		return PACKET_OTHER;
	length = ip->ihl * 4;
	p->ipv4 = 1;
	p->transport = length;
	map_ipv4(&p->source, ip->saddr);
	map_ipv4(&p->target, ip->daddr);
	return parse_tcp(at + length, end, p);
}

static __always_inline int parse_ipv6(void *at, void *end, struct packet *p)
{
	struct ipv6hdr *ip = at;
	u8 next;

	if ((void *)(ip + 1) > end || ip->version != 6)
		return PACKET_MALFORMED;
	__builtin_memcpy(&p->source, &ip->saddr, 16);
	__builtin_memcpy(&p->target, &ip->daddr, 16);
	p->ipv4 = is_mapped(&p->source);
	next = ip->nexthdr;
	at = ip + 1;
#pragma unroll
	for (int i = 0; i <= MAX_EXTENSIONS; i++) {
		struct {
			u8 next, length;
			__be16 fragment;
		} *extension = at;
		u32 size;

		if (next == IPPROTO_TCP) {
			p->transport = at - (void *)ip;
			return parse_tcp(at, end, p);
		}
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_AH && next != IPPROTO_FRAGMENT)
			return PACKET_OTHER; /* also "no next header" */
		if ((void *)(extension + 1) > end)
			return PACKET_MALFORMED;
		if (next == IPPROTO_FRAGMENT) {
			if (extension->fragment & bpf_htons(0xfff9)) /* an offset or M */
				return PACKET_OTHER;
			size = 8;
		} else if (next == IPPROTO_AH) {
			size = (extension->length + 2) * 4; /* RFC 4302 counts in units of 4, */
		} else {
			size = (extension->length + 1) * 8; /* the others in units of 8 */
		}
		at += size;
		next = extension->next;
	}
	return PACKET_MALFORMED;
}

struct vlan_header {
	__be16 tci;
	__be16 inner;
};

static __always_inline int parse_frame(void *at, void *end, struct packet *p)
{
	struct ethhdr *eth = at;
	__be16 protocol;
	u32 tags = 0;

	at = eth + 1;
	if (at > end)
		return PACKET_MALFORMED;
	protocol = eth->h_proto;
#pragma unroll
	for (int i = 0; i < 2; i++) {
		struct vlan_header *tag = at;

		if (protocol != bpf_htons(ETH_P_8021Q) && protocol != bpf_htons(ETH_P_8021AD))
			break;
		at = tag + 1;
		tags++;
		if (at > end)
			return PACKET_MALFORMED;
		protocol = tag->inner;
	}
	p->network = sizeof(*eth) + tags * sizeof(struct vlan_header);
	if (protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(at, end, p);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(at, end, p);
	return PACKET_OTHER;
}

#endif
