public import Host

/// A part of a RAM block as it can be touched at another address of this process than its own mapping's: KVM shows memory files so.
public struct BlockWindow: Sendable, Hashable {
    /// In this process, of the first page.
    public let address: UInt
    /// Index in ``GuestMemory/blocks``.
    public let block: Int
    public let pages: Range<PageIndex>

    public init(address: UInt, block: Int, pages: Range<PageIndex>) {
        self.address = address
        self.block = block
        self.pages = pages
    }

    public var addresses: Range<UInt> {
        address..<address + UInt((pages.upperBound.value - pages.lowerBound.value) << GuestPage.shift)
    }
}

/// Is told where pages of RAM blocks can be touched besides, and of every change, while no vCPU is inside the guest.
public protocol WindowWatch: AnyObject, Sendable {
    /// That is shown from now on, in place of whatever was shown there. - Throws: `SystemError`; then it is taken back.
    func shows(_ window: BlockWindow) throws(SystemError)
    /// Nothing of a RAM block is shown there any more.
    func hides(_ addresses: Range<UInt>)
}
