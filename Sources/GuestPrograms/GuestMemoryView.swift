/// How this room reads guest memory: fill the whole buffer with the bytes from a guest-physical address on.
///
/// The range lies inside the RAM the guest was told of, and does not cross the hole below 4 GiB. Pages that were never touched
/// read as zeroes. A reader should not allocate them (a mapped memfd would: look for holes, or use `pread`).
public typealias GuestMemoryReader =
    (_ physicalAddress: UInt64, _ buffer: UnsafeMutableRawBufferPointer) throws(GuestProgramError) -> Void

/// The blocks of a guest, read from its memory.
// The reader gets a buffer that is valid for its call and as long as it says: this type upholds that.
@safe struct GuestMemoryView {
    let read: GuestMemoryReader

    init(read: @escaping GuestMemoryReader) {
        unsafe self.read = read
    }

    /// Read words of guest memory.
    func words(at physicalAddress: UInt64, count: Int) throws(GuestProgramError) -> [UInt64] {
        var words = [UInt64](repeating: 0, count: count)
        let failure: GuestProgramError? = unsafe words.withUnsafeMutableBytes { buffer in
            do throws(GuestProgramError) {
                // SAFETY: the buffer is the array's storage, for the time of this closure.
                unsafe try read(physicalAddress, buffer)
                return nil
            } catch {
                return error
            }
        }
        if let failure { throw failure }
        return words
    }

    func parameters() throws(GuestProgramError) -> ParameterBlock {
        let block = try words(at: GuestLayout.parameters, count: ParameterBlock.wordCount)
        return try ParameterBlock(words: block)
    }

    func status(of parameters: ParameterBlock) throws(GuestProgramError) -> GuestStatus {
        let shared = try words(at: GuestLayout.shared, count: 5)
        guard shared[0] == GuestLayout.sharedMagic else {
            throw .notAGuest(reason: "there is no shared block at 0xf000")
        }
        var blocks: [[UInt64]] = []
        for index in 0..<Int(parameters.cpus) {
            blocks.append(try words(at: GuestLayout.cpuPageAddress(index), count: GuestStatus.blockWords))
        }
        return try GuestStatus(parameters: parameters, active: shared[2], ready: shared[4], blocks: blocks)
    }
}
