import Testing

@testable import GuestPrograms

@Suite("Order of a pass")
struct PageOrderTests {
    @Test(
        "a pass visits every position once, and the inverse finds at which index",
        arguments: [1, 2, 3, 4, 5, 64, 100, 1000, 4097] as [UInt64], [0, 1, 77] as [UInt64])
    func bijection(positions: UInt64, pass: UInt64) {
        for isRandom in [false, true] {
            let order = PageOrder(positions: positions, isRandom: isRandom, pass: pass, cpu: pass % 3, seed: 42)
            #expect(order.mask + 1 >= positions)
            #expect(positions == 1 || (order.mask + 1) / 2 < positions)
            var seen: Set<UInt64> = []
            for index in 0...order.mask {
                let position = order.position(at: index)
                #expect(position <= order.mask)
                #expect(order.index(of: position) == index)
                seen.insert(position)
            }
            #expect(seen.count == Int(order.mask + 1))
        }
    }

    @Test("random passes differ from each other, from vCPU to vCPU, and from the sequential one")
    func variety() {
        func walk(_ isRandom: Bool, pass: UInt64, cpu: UInt64) -> [UInt64] {
            let order = PageOrder(positions: 256, isRandom: isRandom, pass: pass, cpu: cpu, seed: 1)
            return (0..<256).map(order.position(at:))
        }
        let walks = [walk(false, pass: 0, cpu: 0), walk(true, pass: 0, cpu: 0), walk(true, pass: 1, cpu: 0)]
        let all = walks + [walk(true, pass: 0, cpu: 1)]
        #expect(Set(all).count == 4)
        let neighbours = zip(all[1], all[1].dropFirst()).filter { $0 + 1 == $1 }.count
        #expect(neighbours < 26, "a random pass should rarely go to the next page")
    }

    @Test("the widest share still inverts")
    func wide() {
        let order = PageOrder(positions: 1 << 35 + 1, isRandom: true, pass: 9, cpu: 63, seed: .max)
        for index in [0, 1, 1 << 20, 1 << 35, order.mask] as [UInt64] {
            #expect(order.index(of: order.position(at: index)) == index)
        }
    }
}
